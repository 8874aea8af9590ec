"""What an export tells: tables, the page, the card, snippets."""

"""One batch in, one optimizer step out, and what is kept, shown and checked around it."""

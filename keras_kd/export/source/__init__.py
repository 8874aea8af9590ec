"""The model and its data as the converters want them."""

"""Files of images read within bounds, and what a model makes of them before it sees them."""

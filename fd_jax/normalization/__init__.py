"""How a teacher's tokens are normalised before a student learns them."""

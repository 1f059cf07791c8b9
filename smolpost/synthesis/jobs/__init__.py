"""What each kind of synthetic data asks of its teachers, and what it makes of their replies."""

"""What training minimises: pure tensor functions."""

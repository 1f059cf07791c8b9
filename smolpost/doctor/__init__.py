"""`smolpost doctor`: what can be checked of a stage before it trains, on the user's own model, template and data."""

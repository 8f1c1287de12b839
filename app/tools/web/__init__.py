"""The web server that the playground and the live report share."""

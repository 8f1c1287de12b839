"""Looking at what prepare and train have made."""

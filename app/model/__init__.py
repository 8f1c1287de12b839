"""The GPT and how it writes."""

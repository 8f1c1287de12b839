"""What the local web pages share: the playground, and the report while runs train."""

"""The attacks: each class here is a row of the table."""

"""A model library of one's own: a decoder written with TVM's own front end, and compiled here."""

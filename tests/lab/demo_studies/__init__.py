"""Small studies that the tests of the lab run."""

"""What stands in the way of a network that does not compile, with module and line."""

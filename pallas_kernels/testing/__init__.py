"""What tests of operations need: compilation for a GPU that is not there."""

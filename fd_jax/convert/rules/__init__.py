"""Tables of rules that say which tensor of a file is which parameter, read in both directions."""

"""Adapters: thin rooms between streamrec and other frameworks, the only ones that import them."""

"""A local web page that shows what a model and its index find, and why."""

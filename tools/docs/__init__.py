"""Documentation that is made from the code: the reference of the configuration, and the hook of the site."""

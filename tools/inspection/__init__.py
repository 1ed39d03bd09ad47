"""Looking at preference data: what is counted (statistics), decoded (decoding), and shown (terminal, page)."""

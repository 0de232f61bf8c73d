"""Pictures of the terminal for the documents, made of what the commands really print."""

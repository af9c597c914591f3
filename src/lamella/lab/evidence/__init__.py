"""What is kept of finished studies, and the page written from it."""

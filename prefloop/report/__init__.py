"""Reports for people: console tables, Markdown, LaTeX and the HTML page; nothing is computed here."""

"""Reports of results: tables, pictures, one page, and the generated documentation."""

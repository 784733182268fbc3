"""Self-contained HTML pages and the pictures in them; no network, no script."""

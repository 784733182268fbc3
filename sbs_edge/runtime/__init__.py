"""What runs in production: bundles, sessions, label scoring, rationales. No torch here."""

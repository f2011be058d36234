"""Optional integrations; each needs the extra of its name."""

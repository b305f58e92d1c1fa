"""Run specs: one YAML file a run, validated, rendered to one command line, launched and resumed."""

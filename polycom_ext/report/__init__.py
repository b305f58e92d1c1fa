"""Tables and plots of finished runs, beside what the paper published."""

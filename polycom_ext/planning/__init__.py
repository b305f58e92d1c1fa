"""What a run needs before it is started: parameters, memory, traffic and time, from its spec alone."""

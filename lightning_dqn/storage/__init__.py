"""Where the replay memory stores observations: RAM, a mapped file or a device, and stacks of frames."""

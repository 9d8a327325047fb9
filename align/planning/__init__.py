"""Planning: what a run will hold in memory, found by walking it on tensors without data.

targets   the device it is planned for        hollow   models without weights
phantom   tensors without data, counted       walks    steering and training, walked
"""

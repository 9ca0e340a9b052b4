"""The HTML page of a job: its prefix tree, the plan against reality, resource use over time."""

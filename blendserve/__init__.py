"""BlendServe: offline LLM inference as a step of a data pipeline.

Parquet in, Parquet out. `blendserve.job` is the page to read first.
"""

__version__ = "0.1.0"

"""Planning: what a run consists of, before anything is computed."""

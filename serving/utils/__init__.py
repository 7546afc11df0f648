"""General helpers: files, processes, CPU cores, memory allocation, progress display."""

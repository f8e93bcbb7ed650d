"""Co-training: modules that are trained in parallel share one loader (``bigincubate run --co-train``).

`server` loads each batch once and sends it to all modules, `client` receives batches in the process of a module, and
`launch` defines the server's processes for the local launcher. Co-training does not change the weights of the modules.
"""

SERVER_NAME = "BIGINCUBATE_SHARED_LOADER"  # environment variable with the name of the server's sockets

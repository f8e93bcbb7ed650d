"""Co-training: modules that train at the same time share one loader, ``bigincubate run --co-train``.

`server` makes each batch once and sends it to all modules, `client` is a module's end of the connection, `launch`
describes the server's processes to the local launcher. The modules' weights are the same as without co-training.
"""

SERVER_NAME = "BIGINCUBATE_SHARED_LOADER"  # environment variable with the name of the server's sockets

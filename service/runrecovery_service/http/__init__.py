"""The contract as JSON over HTTP (the Connect protocol). Imported when `http_listen` is set."""

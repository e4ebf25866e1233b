"""A page in the browser on which a run predicts images: server, queue and static files (`taskexpert serve`)."""

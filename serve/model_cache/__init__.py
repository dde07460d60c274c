"""Model files of an S3 store on a node's own disk: downloaded once, checked, shared, bounded."""

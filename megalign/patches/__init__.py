"""Every patch of an upstream library, one file a library, each with its upstream line and when it goes."""

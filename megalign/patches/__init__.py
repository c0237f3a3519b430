"""Every patch of an upstream library, one file or folder a library, each with its upstream line and when it goes."""

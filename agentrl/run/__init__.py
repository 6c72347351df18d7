"""A run's configuration, folder and files, and the policies that it holds."""

"""The `nearfar` command and what every app's command line shares."""

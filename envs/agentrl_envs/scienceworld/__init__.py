"""ScienceWorld: the simulator in a JVM, the listing of tasks, the expert, and short lists of actions."""

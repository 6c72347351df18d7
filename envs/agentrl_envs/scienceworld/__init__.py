"""ScienceWorld: its simulator in a JVM, the listing of its tasks, its expert, and short lists of actions."""

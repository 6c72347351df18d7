"""The methods: one file for each, registered by entry points as a third party's are."""

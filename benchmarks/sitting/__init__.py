"""All that wants a GPU, in one sitting: independent parts, a record of each, a page made from the records."""

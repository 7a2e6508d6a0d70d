"""Will it fit, how long will a step and the whole run take at least, and what would make it smaller?"""

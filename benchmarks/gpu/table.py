def page(known): return ""

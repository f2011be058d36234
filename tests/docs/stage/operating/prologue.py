import shop

shop.open_shop()

-- An uploaded snapshot that an instance's data is to be replaced by; its file lies with the instance. Null: none.

ALTER TABLE instances ADD COLUMN load_upload uuid;

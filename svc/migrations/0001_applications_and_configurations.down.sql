DROP TABLE configuration_versions, configurations, applications;
DROP TYPE shown_configuration;
DROP FUNCTION make_etag, keep_application, keep_configuration, configuration_ids_now, merge_patch;
DROP FUNCTION record_configuration_version, keep_configuration_versions, prune_configuration_versions;
DROP DOMAIN ulid, not_blank, document;
DROP TYPE operation;
